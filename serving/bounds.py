"""How long somebody at the other end of a connection may take; the same for the API and for the router before it."""

# Whole heads come in one packet; whoever needs longer only holds a connection.
HEAD_S_MAX = 15.0
# A whole body over a slow line; whoever is slower only holds a connection.
BODY_S_MAX = 30.0
# A reader this slow reads no more: what the network holds is minutes of text already.
STALLED_S_MAX = 60.0
