package proxy

import (
	"testing"
	"time"
)

// TestTableIsWokenForWhatIsSooner: a date that comes after the sleep wakes
// nobody, one that comes before it does.
func TestTableIsWokenForWhatIsSooner(t *testing.T) {
	table, now := newTable(), time.Now()
	woken := func() bool {
		select {
		case <-table.wake:
			return true
		default:
			return false
		}
	}
	first, second := &conn{}, &conn{}
	table.add(first, now.Add(time.Second))
	if woken() {
		t.Error("woken though it does not sleep")
	}
	if due, wait := table.takeDue(now); len(due) != 0 || wait != time.Second {
		t.Errorf("%d are due, sleeps for %s; want none, 1s", len(due), wait)
	}
	table.remove(first)
	table.add(second, now.Add(2*time.Second))
	table.schedule(second, now.Add(time.Second))
	table.schedule(second, time.Time{})
	if woken() {
		t.Error("woken for what is due after the sleep, or never")
	}
	table.schedule(second, now.Add(time.Millisecond))
	if !woken() {
		t.Error("not woken for what is due before the sleep ends")
	}
	if due, _ := table.takeDue(now.Add(time.Millisecond)); len(due) != 1 || due[0] != second {
		t.Errorf("due are %v", due)
	}
	if due, wait := table.takeDue(now.Add(time.Millisecond)); len(due) != 0 || wait != time.Hour {
		t.Errorf("%d are due, sleeps for %s; want none, an hour", len(due), wait)
	}
	table.add(first, now.Add(time.Minute))
	if !woken() {
		t.Error("not woken from a sleep without a date")
	}
}
