//go:build race

package proxy

// raceEnabled says that pools drop what they hold at random.
const raceEnabled = true
