// Package livetest has nothing but tests: whole backups by the real program, of real servers under load,
// in each way to freeze and to read, and with everything going wrong that can.
package livetest
