"""What is computed element by element: activations, gates, rotary positions."""
