"""Models below the model roots over HTTP."""
