"""The MLflow server as it is seen from here: its address, its refusals and its outages."""
