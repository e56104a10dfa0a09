"""Annotate texts with a model at one's side: the encoder, the tutor that learns meanwhile, the session, the way in."""
