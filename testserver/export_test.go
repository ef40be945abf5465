package testserver

// ServeCoAP lets tests ask the CA without a socket.
var ServeCoAP = (*Server).serveCoAP
