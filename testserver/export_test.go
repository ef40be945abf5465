package testserver

// ServeCoAP lets tests ask the CA without a socket.
var ServeCoAP = (*Server).serveCoAP

// Operations are all that there are.
var Operations = operations
