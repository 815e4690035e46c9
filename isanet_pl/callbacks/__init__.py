"""What runs beside a training or an evaluation: Lightning callbacks."""
