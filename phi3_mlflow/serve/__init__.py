"""`phi3-mlflow serve`: an OpenAI-compatible streaming server over logged models."""
