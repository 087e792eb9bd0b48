//go:build race

package policy

// raceEnabled says that the tests run ten times slower.
const raceEnabled = true
