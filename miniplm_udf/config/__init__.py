"""One experiment file (YAML): its sections, its rules, and how it is read and checked.

`experiment.py` reads the file and the overrides; each other module declares the sections of one stage. `rules.py` knows
the named rules in `rule_files/`, and `student_models.py` the paper's models in `student_files/`. Nothing here imports
Spark, torch or pyarrow.
"""
