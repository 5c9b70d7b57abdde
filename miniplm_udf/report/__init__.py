"""The report: one self-contained HTML page about an experiment: tables, students, MLflow. Driver only.

    histogram Spark columns -> bucket counts
    queries   Spark tables -> counts, bucket counts and a few texts (never a table collected whole)
    students  model folders and MLflow -> losses, curves, differences
    figures   those numbers -> inline SVG
    render    everything -> report.html, and an artifact of the MLflow run "comparison"

Reads only; a rerun replaces the page. Nothing is loaded by this package's import but this text.
"""
