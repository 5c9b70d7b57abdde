"""The report: one self-contained HTML page about an experiment: tables, students, MLflow. Driver only.

    histogram Spark columns -> bucket counts
    queries   Spark tables -> counts, bucket counts and a few texts (never a whole table)
    baselines settings of the students -> the baseline of each student
    students  model folders and MLflow -> losses, curves, differences
    figures   these numbers -> inline SVG
    render    all of these -> report.html, and an artifact of the MLflow run "comparison"

Reads only; a rerun replaces the page. Importing this package loads nothing.
"""
