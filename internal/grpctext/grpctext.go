// Package grpctext says what a gRPC call failed with in the words of whoever
// found it out, without what gRPC puts around them: a person who reads "rpc
// error: code = Unavailable desc = connection error: desc = \"transport: Error
// while dialing: dial unix …" looks long for the part that helps.
package grpctext

import (
	"strconv"
	"strings"

	"google.golang.org/grpc/status"
)

// connection is what the message of a call begins with, or has in it, whose
// connection failed. It comes from the client's own side; a server that writes
// it too is believed, so nothing but words may hang on it.
const connection = "connection error: desc = "

// Message takes off what gRPC puts around the error of a connection. A message
// that has nothing of it is returned as it is.
func Message(message string) string {
	if _, quoted, ok := strings.Cut(message, connection); ok {
		if text, err := strconv.Unquote(quoted); err == nil {
			message = text
		}
	}
	return strings.TrimPrefix(strings.TrimPrefix(message, "transport: "), "Error while dialing: ")
}

// OfConnection tells the error of a connection, which nobody has answered on,
// from the answer of a server.
func OfConnection(err error) bool {
	return err != nil && strings.Contains(status.Convert(err).Message(), connection)
}

// Plain returns err with the plain Message of its gRPC status alone as text. An
// error without a status, and nil, are returned as they are. What it returns
// wraps err, so that its code can still be asked for.
func Plain(err error) error {
	if s, ok := status.FromError(err); ok && err != nil {
		return plainError{error: err, text: Message(s.Message())}
	}
	return err
}

type plainError struct {
	error
	text string
}

func (e plainError) Error() string { return e.text }

func (e plainError) Unwrap() error { return e.error }
