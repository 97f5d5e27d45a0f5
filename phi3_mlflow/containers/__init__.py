"""`phi3-mlflow containerize`: what an image, a compose file and a cluster need to run `phi3-mlflow serve`."""
