"""What happens to an image: in a worker of the loader (`transforms`), then on the device (`device`)."""
