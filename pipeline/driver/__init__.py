"""What the driver does before workers start: check the run, make its first weights, apply the changes of a resume.

May import every package of `pipeline` but `demo` and `train`; Ray and MLflow only through them.
"""
