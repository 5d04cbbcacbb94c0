"""The distributed part of the platform: Ray runs it, Optuna searches, MLflow remembers."""
