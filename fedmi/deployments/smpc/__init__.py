"""Training on secret shares: nobody holds the records."""
