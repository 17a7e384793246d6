package freeze

import (
	"encoding/json"
	"unicode/utf8"
)

// Text is a string of any bytes: a path, an argument, a variable. JSON knows only UTF-8, and would
// quietly put other characters in their place; so what is not UTF-8 is written as an object with the
// bytes in base64.
type Text string

// Texts is a list of Text.
type Texts []string

type encodedText struct {
	Base64 []byte `json:"base64"`
}

// MarshalJSON writes a string where that is exact.
func (t Text) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(t)) {
		return json.Marshal(string(t))
	}
	return json.Marshal(encodedText{[]byte(t)})
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (t *Text) UnmarshalJSON(data []byte) error {
	if len(data) > 0 && data[0] == '{' {
		var e encodedText
		err := json.Unmarshal(data, &e)
		*t = Text(e.Base64)
		return err
	}
	return json.Unmarshal(data, (*string)(t))
}

// MarshalJSON writes each as a Text.
func (t Texts) MarshalJSON() ([]byte, error) {
	list := make([]Text, len(t))
	for i, s := range t {
		list[i] = Text(s)
	}
	return json.Marshal(list)
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (t *Texts) UnmarshalJSON(data []byte) error {
	var list []Text
	if err := json.Unmarshal(data, &list); err != nil {
		return err
	}
	*t = make(Texts, len(list))
	for i, s := range list {
		(*t)[i] = string(s)
	}
	return nil
}
