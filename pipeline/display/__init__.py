"""Output for people: text on a terminal, tables, pictures, the line that follows a run.

May import `pipeline.evaluation` and what lies below it.
"""
