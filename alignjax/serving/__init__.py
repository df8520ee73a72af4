"""An OpenAI-compatible server over runs: records of the wire, the thread that decodes, the routes, the chat page.

Another route, or another field of a request, comes in here; what is compiled for it is in `sampling`.
It may import `runs`, `sampling`, `data` and the rooms below; of this room, `app` alone imports the web's packages.
"""
