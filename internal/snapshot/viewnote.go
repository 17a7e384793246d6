package snapshot

// ViewNote is left with the views that are kept on the filesystem: what they show, so that they can be
// restored without the repository.
type ViewNote struct {
	Snapshot string    `json:"snapshot,omitempty"` // the id of the snapshot that was made from them
	Manifest *Manifest `json:"manifest"`
}

// NewViewNote makes a note. Of the manifest it keeps what a restore needs; the lists of spaces and of
// what is missing can be long.
func NewViewNote(snapshot string, m Manifest) ViewNote {
	stores := make([]Store, len(m.Stores))
	for i, s := range m.Stores {
		s.Spaces = nil
		stores[i] = s
	}
	m.Stores = stores
	m.Proof.Missing, m.Proof.Unreadable = nil, nil
	return ViewNote{Snapshot: snapshot, Manifest: &m}
}
