"""What reads a version of a corpus out of a root: texts with their scores for people, files for other trainers."""
