"""jaxshard: model weights between any two layouts."""
