"""The HTTP server: `app.create_app` makes the application, `models.load` opens bundles, `server.run` listens."""
