// Package pattern is bodies of any size that nobody has to hold: each byte is
// known by where it is.
package pattern

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
)

// period is after how many bytes it begins anew: no power of two, so that
// blocks which change places are noticed.
const period = 251

// turns is more than one read wants, mostly.
var turns = Bytes(period * 256)

// Bytes returns the first size bytes.
func Bytes(size int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(i % period)
	}
	return b
}

// Reader reads without end. The zero value begins at the first byte.
type Reader struct{ At int64 }

// Read implements io.Reader.
func (r *Reader) Read(b []byte) (int, error) {
	for n := 0; n < len(b); {
		k := copy(b[n:], turns[r.At%period:])
		n, r.At = n+k, r.At+int64(k)
	}
	return len(b), nil
}

// Of reads the first size bytes.
func Of(size int64) io.Reader { return io.LimitReader(&Reader{}, size) }

// At reads anywhere.
type At struct{}

// ReadAt implements io.ReaderAt.
func (At) ReadAt(b []byte, at int64) (int, error) { return (&Reader{at}).Read(b) }

// Sum is the SHA-256 of the first size bytes, in hex.
func Sum(size int64) string {
	sum := sha256.New()
	_, _ = io.Copy(sum, Of(size))
	return hex.EncodeToString(sum.Sum(nil))
}

// Compare reads to the end and returns how much it has read. It is an error
// if that is something else.
func Compare(r io.Reader) (n int64, err error) {
	want, got := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		k, err := r.Read(got)
		_, _ = (&Reader{n}).Read(want[:k])
		if !bytes.Equal(got[:k], want[:k]) {
			return n, fmt.Errorf("other bytes behind the first %d", n)
		}
		n += int64(k)
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}
