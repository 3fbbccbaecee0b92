"""Server: OpenAI's protocol for chats and transcriptions, on the engine. Extra: `serve`."""
