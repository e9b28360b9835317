"""What trains, evaluates and predicts any task."""
