"""What a growth did to a model, and how important each layer is."""
