package proxy

import (
	"syscall"
	"testing"
)

// plenty is an inlet that has always something to read, as much as there is
// room for.
type plenty struct {
	buf   *[]byte
	class int
}

func (p *plenty) next() ([]byte, error) {
	p.class = largeClass
	p.buf = takeBuffer(p.class)
	return (*p.buf)[:payloads[p.class]], nil
}

func (p *plenty) release()                { bufferPools[p.class].Put(p.buf) }
func (p *plenty) keep() (*[]byte, int)    { return p.buf, p.class }
func (p *plenty) socket() syscall.RawConn { return nil }
func (p *plenty) interrupt()              {}
func (p *plenty) resume()                 {}
func (p *plenty) rest()                   {}

// TestIntakeOfFrames: what is not whole before the largest read is kept without
// new memory: frames of HTTP/2 end where they like.
func TestIntakeOfFrames(t *testing.T) {
	const left = maxPlaintext // of a frame
	in := &intake{src: &plenty{}}
	once := func() {
		if err := in.fill(); err != nil {
			t.Fatal(err)
		}
		in.take(len(in.b) - left)
		in.b[0] = 'x'
	}
	once()
	if n := testing.AllocsPerRun(1000, once); n >= 1 && !raceEnabled {
		t.Errorf("%v allocations a read", n)
	}
	if err := in.fill(); err != nil || len(in.b) != left+payloads[largeClass] || in.b[0] != 'x' {
		t.Errorf("%d bytes, %v", len(in.b), err)
	}
	in.drop()
}
