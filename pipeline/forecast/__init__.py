"""Forecast of a run before it starts: steps, bytes, hours and cost, from earlier runs or from figures of the package.

May import `pipeline.tracking` and what lies below, and torch only where a model is measured. The forecast is kept with the
run and compared with the clock at its end.
"""
