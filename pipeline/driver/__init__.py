"""Work of the driver around the workers: checks, first weights, and the changes of a resume.

May import `pipeline.cluster`, `pipeline.inference`, `pipeline.exchange`, `pipeline.built_in` and what lies below; Ray
and MLflow only through them.
"""
