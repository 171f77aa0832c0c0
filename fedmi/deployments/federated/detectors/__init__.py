"""What a careful client can notice of the model it is sent, before it trains."""
