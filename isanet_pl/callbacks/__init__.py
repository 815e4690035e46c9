"""What runs beside a training or an evaluation: one Lightning callback a module."""
