"""Builders: weights in, an MLflow model out. One module for each way to run the weights."""
