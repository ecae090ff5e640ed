"""What people look at: text on a terminal, tables, pictures, the line that follows a run.

May import `pipeline.evaluation`, `pipeline.checkpoint`, `pipeline.tracking`, `pipeline.data` and what lies below.
"""
