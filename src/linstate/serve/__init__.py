"""The server: OpenAI's interface over HTTP, states as a resource, reading as a service, and a page (extra ``serve``)."""
