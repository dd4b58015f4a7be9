"""What a stream of `pushforward.online` is made of: its arguments, the model read for one step, compiled programs."""
