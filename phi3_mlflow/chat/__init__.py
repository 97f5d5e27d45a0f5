"""`phi3-mlflow chat`: a conversation in the terminal, with a logged model or with a server."""
