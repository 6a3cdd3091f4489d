"""An endless source of captioned pictures whose truth is known: small ray-traced scenes on a table."""
