"""What to run before a long run: does it fit into memory, and is the update the same however it is split?"""
