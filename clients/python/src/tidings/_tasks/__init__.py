"""What is known and said of Celery tasks; `tidings.celery` is its public face."""
