"""What people look at: frames, captions, timing, animations and their files, plots."""
