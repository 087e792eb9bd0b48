package time

import (
	"syscall"
	"unsafe"
)

// wrongClock is by how many seconds the wall clock is wrong. It may change at any
// moment. The monotonic clock goes on as it does when a host's clock is set.
var wrongClock = openWrongClock()

func openWrongClock() *int64 {
	path, ok := syscall.Getenv("NARTHEX_WRONG_CLOCK")
	if !ok {
		return new(int64)
	}
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		panic("open " + path + ": " + err.Error())
	}
	page, err := syscall.Mmap(fd, 0, 8, syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		panic("map " + path + ": " + err.Error())
	}
	return (*int64)(unsafe.Pointer(&page[0]))
}
