"""The libraries that are measured, one file each. A *side* is a library with a kind of memory, an algorithm or a transport.

A side's class joins its ranks, and has a method for every operation that it can do. A method takes the tensors and returns the call to time, so
that whatever a library lets its users prepare once is not in the time. A method that is not there, or raises `Unsupported`, leaves the side out
of the table.
"""
