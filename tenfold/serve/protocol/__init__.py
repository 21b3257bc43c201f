"""What goes over the wire: one module an endpoint, requests as clients send them and responses as they read them."""
