"""Model versions in MLflow, the promotion guard and the signed history of approvals."""
