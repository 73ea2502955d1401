"""Chatting with models in the terminal."""
