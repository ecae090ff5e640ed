"""The built-in data set and the small backbone that is pre-trained on it.

May import `pipeline.training` and what lies below it; never Ray or MLflow.
"""
