"""Between our types and messages. Everything that comes in is checked here, and bounded.

A message that breaks the contract raises ProtocolError (between services) or InvalidRequestError
(from a caller), naming the field, what was got and what is allowed.
"""
