"""What happens to an image, in a worker and on the device."""
