package testserver

import (
	"context"

	"estenroll/internal/coap"
)

// ServeCoAP lets tests ask the CA without a socket.
func ServeCoAP(s *Server, ctx context.Context, req *coap.Request) *coap.Response {
	return s.serveCoAP(false)(ctx, req)
}

// Operations are all that there are.
var Operations = operations
